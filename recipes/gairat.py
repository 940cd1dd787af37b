"""GAIRAT: adversarial training that listens to the examples that fall after few steps of the attack.

Zhang et al., "Geometry-aware Instance-reweighted Adversarial Training", ICLR 2021, in the setting of the
MAIL paper (NeurIPS 2021). Read as in GAIRAT's code: kappa counts the correct iterates. The MAIL paper's LPS, the first
crossing, is margin=lps. Weights start where the learning rate first drops, as for MAIL.

    robustmail run gairat
    robustmail run gairat margin=lps --out runs/gairat_lps
    robustmail run gairat "weighter=Sigmoid(slope=1, bias=4)" --out runs/gairat_sigmoid  GAIRAT's sigmoid variant
    robustmail run gairat "weighter=Discrete(steps=10)" --out runs/gairat_discrete       its discrete variant
    robustmail run gairat:wrn                                                          the paper's WRN-32-10 (Table 3)
"""

from robustmail import AT, PGD, SGD, Recipe, Stairs, Tanh, cifar10, kappa

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=PGD(eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows, with a trace,
    objective=AT(),  # learn it,
    margin=kappa,  # and listen to those
    weighter=Tanh(lam=-1.0, steps=10),  # that fewer steps of the attack fool
    burn_in=74,
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

wrn = recipe.but(
    model="cifar_wrn32_10",
    optimizer=SGD(lr=Stairs({0: 0.1, 74: 0.01, 89: 0.001}), momentum=0.9, weight_decay=7e-4),
)
