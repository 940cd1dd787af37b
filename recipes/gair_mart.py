"""GAIR-MART: MART that listens to the examples that fall after few steps of the attack.

Zhang et al., "Geometry-aware Instance-reweighted Adversarial Training", ICLR 2021, in the setting of the
MAIL paper (NeurIPS 2021). No official code exists; here the weights act on the BCE term, where MAIL-MART puts its own
(like for like).

    robustmail run gair_mart
    robustmail run gair_mart margin=lps --out runs/gair_mart_lps
"""

from robustmail import MART, PGD, SGD, Recipe, Stairs, Tanh, cifar10, kappa

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=PGD(eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows, with a trace,
    objective=MART(beta=6.0),  # learn it, mind those that are wrong already,
    margin=kappa,  # and listen to those
    weighter=Tanh(lam=-1.0, steps=10),  # that fewer steps of the attack fool
    burn_in=74,
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)
