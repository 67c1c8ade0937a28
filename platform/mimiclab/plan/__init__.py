"""What a training on machines that disappear will take: hours, money, goodput; before any machine is rented.

``fleet`` says when machines go, ``job`` what one training needs, ``expected`` is the closed formula where there is one,
``simulate`` plays a run through, ``quote`` puts both into words and figures.
"""
