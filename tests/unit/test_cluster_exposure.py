"""What is said of an address that a job server listens on."""

import pytest

from mimiclab.cluster import exposure
from mimiclab.errors import UserError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_loopback_with_a_token_needs_no_words(host: str) -> None:
    exposure.check(host, token=True)
    assert exposure.risk(host, 8265, token=True) is None


def test_loopback_without_a_token_lets_every_user_of_the_machine_in() -> None:
    exposure.check("127.0.0.1", token=False)
    risk = exposure.risk("127.0.0.1", 8265, token=False)
    assert risk is not None
    assert "every user of this machine can run commands as you, by the job server at 127.0.0.1:8265" in risk


def test_an_address_that_others_reach_comes_with_the_risk_and_the_way_around_it() -> None:
    exposure.check("0.0.0.0", token=True)
    risk = exposure.risk("0.0.0.0", 8265, token=True)
    assert risk is not None
    assert "other machines reach the dashboard and the job server at 0.0.0.0:8265" in risk
    assert "Who has the token of this cluster can run commands here as you, and the token travels unencrypted" in risk
    assert "ssh -L 8265:127.0.0.1:8265" in risk
    assert exposure.own_address("0.0.0.0") == "127.0.0.1"
    assert exposure.own_address("10.0.0.7") == "10.0.0.7"


def test_such_an_address_without_a_token_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"--dashboard-host 0\.0\.0\.0: without a token, .*expected RAY_AUTH_MODE=token"
    ):
        exposure.check("0.0.0.0", token=False)


@pytest.mark.parametrize("host", ["198.51.100.1", "no such host", "::"])
def test_what_is_no_address_of_this_machine_is_refused(host: str) -> None:
    with pytest.raises(UserError, match=rf"--dashboard-host {host}: .*expected an address of this machine"):
        exposure.check(host, token=True)
