"""What ASHA saves and what it misses: a search over mimic weights and stagger against all of its trials run to the end.

    python experiments/benchmarks/search_savings.py [--folder runs/savings] [--output FILE] [--set KEY=VALUE ...]

The same trials with the same seeds twice, on scenes: first all 12 to their end, then with rungs. What both have in
common is the same training, which is checked value by value. How much ASHA saves depends on the order in which trials
reach a rung, and so on chance: from the curves of the full sweep its decisions are made again in 1000 other orders. A
run that was stopped goes on with the same command. Written as Markdown: half an hour for the sweep, on two cores.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

from machine import surroundings
from rich.console import Console

from mimiclab import runs
from mimiclab.experiment import LoadedExperiment, load_experiment
from mimiclab.search.asha import Asha
from mimiclab.search.driver import search
from mimiclab.search.record import Record
from mimiclab.search.results import show
from mimiclab.search.story import SearchStory, tell

EXPERIMENT = Path(__file__).parent.parent / "search" / "mimic-stagger.yaml"
# A short form: a trial takes five minutes on one core. Rungs after 1, 3 and 9 of 12 epochs.
SETTING = (
    "data.scenes.train=300",
    "optim.global_batch=4",
    "optim.epochs=12",
    "optim.schedule=cosine",
    "optim.milestones=[]",
    "optim.warmup_steps=20",
    "eval.every_epochs=1",
    "eval.num_pictures=0",
    "checkpoint.every_steps=75",
    "search.trials=12",
    "search.grace_period=1",
    "search.reduction_factor=3",
    "search.max_concurrent=2",
)
ORDERS = 1000

# What was hoped for.
MOST_AP_LOST, MOST_STEPS = 0.01, 0.45


def main() -> None:
    """Run both searches and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("runs/savings"), help="for data, runs and MLflow's store")
    parser.add_argument("--output", type=Path, help="file for the Markdown; it is printed anyway")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over the setting, in both")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    places = [
        f"data.scenes.root={folder}/data",
        f"where.storage={folder}/runs",
        f"where.tracking=sqlite:///{folder}/mlflow.db",
    ]

    def load(name: str, *more: str) -> LoadedExperiment:
        return load_experiment(EXPERIMENT, [*SETTING, *places, *args.set, f"name={name}", *more])

    asha = load("savings-asha")
    # Without a rung below the last epoch nothing is compared.
    full = load("savings-full", f"search.grace_period={asha.experiment.optim.epochs}")
    text = _report(_run(full), _run(asha), args.set)
    print(text)
    if args.output:
        args.output.write_text(text)


def _run(loaded: LoadedExperiment) -> SearchStory:
    search(loaded, console=Console(soft_wrap=True, markup=False))
    return tell(Record(runs.storage_of(loaded.experiment)).events)


def _best(story: SearchStory) -> float:
    return max(best.value for trial in story.trials.values() if (best := trial.best("max")))


def _steps(story: SearchStory) -> int:
    """Of all trials, each up to its last evaluation."""
    return sum(trial.curve[-1].step or 0 for trial in story.trials.values() if trial.curve)


def _hours(story: SearchStory) -> float:
    return story.account.spent(story.heard)


def _report(full: SearchStory, asha: SearchStory, overrides: list[str]) -> str:
    return "\n".join([*_summary(full, asha, overrides), *_replayed(full), *_trials(full, asha)]) + "\n"


def _summary(full: SearchStory, asha: SearchStory, overrides: list[str]) -> Iterator[str]:
    lost, share = _best(full) - _best(asha), _steps(asha) / _steps(full)
    yield "# What ASHA saves\n"
    options = "".join(f" --set {shlex.quote(override)}" for override in overrides)
    yield f"Command: `python experiments/benchmarks/search_savings.py{options}`; its setting is in the file.\n"
    yield f"{surroundings('ray', 'torch', 'torchvision')}; no GPU used.\n"
    space = ", ".join(f"`{key}`" for key in asha.config.space)
    yield (
        f"{len(asha.trials)} trials over {space}, {asha.max_t} epochs each, one worker of one thread each; rungs at "
        f"{', '.join(map(str, asha.rungs))}. Same values and seeds in both searches.\n"
    )
    yield "| | all to the end | ASHA | |\n|---|---|---|---|"
    yield f"| best {asha.metric} | {_best(full):.4f} | {_best(asha):.4f} | {100 * lost:+.2f} AP lost |"
    yield f"| steps trained | {_steps(full)} | {_steps(asha)} | {100 * share:.0f} % |"
    yield f"| core-hours | {_hours(full):.2f} | {_hours(asha):.2f} | {100 * _hours(asha) / _hours(full):.0f} % |"
    yield ""
    yield (
        f"Expected: the best within {100 * MOST_AP_LOST:g} AP ({_held(lost <= MOST_AP_LOST)}) at no more than "
        f"{100 * MOST_STEPS:.0f} % of the steps ({_held(share <= MOST_STEPS)}).\n"
    )
    common = [
        (point.value, again.value)
        for name, trial in asha.trials.items()
        for point, again in zip(trial.curve, full.trials[name].curve, strict=False)
    ]
    equal = sum(value == again for value, again in common)
    yield f"{equal} of the {len(common)} evaluations that both made gave the same value to the last bit.\n"


def _replayed(full: SearchStory) -> Iterator[str]:
    curves = {name: {p.epoch: p.value for p in trial.curve} for name, trial in full.trials.items()}
    yield (
        f"The decisions on the curves of the full sweep, in {ORDERS} other orders of the trials and of their "
        "evaluations, two at a time; median, and tenth to ninetieth percentile. Compared once is Ray Tune's form.\n"
    )
    yield "| trials are compared | % of the steps | AP lost | both expectations hold |\n|---|---|---|---|"
    for again in (False, True):
        found = [_replay(full, curves, random.Random(order), again=again) for order in range(ORDERS)]
        shares = [spent / (full.max_t * len(curves)) for spent, _ in found]
        lost = [_best(full) - best for _, best in found]
        both = sum(a <= MOST_STEPS and b <= MOST_AP_LOST for a, b in zip(shares, lost, strict=True))
        name = "again at each result" if again else "once at each rung"
        yield f"| {name} | {_spread(shares)} | {_spread(lost)} | in {100 * both / ORDERS:.1f} % |"
    yield ""


def _spread(shares: list[float]) -> str:
    ordered, tenth = [100 * share for share in sorted(shares)], len(shares) // 10
    return f"{statistics.median(ordered):.1f} ({ordered[tenth]:.1f} to {ordered[-tenth - 1]:.1f})"


def _replay(
    story: SearchStory, curves: Mapping[str, Mapping[int, float]], order: random.Random, *, again: bool
) -> tuple[int, float]:
    """Epochs that ASHA trains and the best value that it sees, if trials come in this order."""
    config = story.config
    asha = Asha(
        max_t=story.max_t, grace_period=1, reduction_factor=config.reduction_factor, mode=config.mode, again=again
    )
    waiting = order.sample(sorted(curves), len(curves))
    running: dict[str, int] = {}
    spent, best = 0, 0.0
    while waiting or running:
        while waiting and len(running) < 2:
            running[waiting.pop()] = 0
        name = order.choice(sorted(running))
        running[name] += 1
        epoch = running[name]
        value = curves[name][epoch]
        spent, best = spent + 1, max(best, value)
        if not asha.decide(name, epoch, value).go_on or epoch == story.max_t:
            del running[name]
    return spent, best


def _trials(full: SearchStory, asha: SearchStory) -> Iterator[str]:
    keys = list(full.config.space)
    yield f"| trial | {' | '.join(f'`{key}`' for key in keys)} | all to the end | ASHA | epochs | |"
    yield f"|{'---|' * (len(keys) + 5)}"
    for trial in full.ranked():
        again = asha.trials[trial.name]
        bests = [f"{best.value:.4f}" if (best := each.best("max")) else "-" for each in (trial, again)]
        cells = [trial.name, *(show(trial.values[key]) for key in keys), *bests, str(again.t), again.outcome]
        yield f"| {' | '.join(cells)} |"


def _held(holds: bool) -> str:
    return "it is" if holds else "**it is not**"


if __name__ == "__main__":
    main()
