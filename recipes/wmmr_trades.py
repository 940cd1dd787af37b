"""WMMR-TRADES: TRADES whose divergence is weighed by the exponential of the probabilistic margin.

Zeng et al., AAAI 2021, in the setting of the MAIL paper; alpha 2 and beta 5 as in the authors' code on CIFAR-10,
whose weights are not divided by their mean. Detached, where their gradient runs through the weights (1.6 times as
large with the same weights).

    robustmail run wmmr_trades
    robustmail run wmmr_trades weighter.normalize=True --out runs/wmmr_trades_mean_one
"""

from robustmail import SGD, TRADES, Exp, Recipe, Stairs, cifar10, pm_adv, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=TRADES(beta=5.0),  # pull the two predictions together,
    margin=pm_adv,  # and pull hardest
    weighter=Exp(alpha=2.0, normalize=False),  # where the true class leads least
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)
