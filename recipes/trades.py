"""TRADES: cross-entropy on natural images, and predictions that do not move under attack.

Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019, in the setting of the
MAIL paper (NeurIPS 2021), which does not state the beta of its baseline: 5 as for MAIL-TRADES (TRADES' own script: 6).

    robustmail run trades
    robustmail run trades objective.beta=6 --out runs/trades_beta_6
    robustmail run trades:wrn                                        the paper's WRN-32-10 (Table 3)
    robustmail run trades:code                                       the baseline of MAIL's released code
"""

from robustmail import SGD, TRADES, Recipe, Stairs, cifar10, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=TRADES(beta=5.0),  # and pull the two predictions together
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

wrn = recipe.but(
    model="cifar_wrn32_10",
    optimizer=SGD(lr=Stairs({0: 0.1, 74: 0.01, 89: 0.001}), momentum=0.9, weight_decay=7e-4),
)

code = recipe.but(
    attack=torchattack("TPGD", eps=0.031, alpha=0.007, steps=10),
    epochs=120,
    optimizer=SGD(lr=Stairs({0: 0.01, 75: 0.001, 90: 0.0001, 100: 0.00001}), momentum=0.9, weight_decay=3.5e-3),
    select="last",
)
