"""MAIL-MART: MART that listens to the examples whose probabilistic margin is small.

Wang et al., "Probabilistic Margins for Instance Reweighting in Adversarial Training", NeurIPS 2021.

    robustmail run mail_mart
    robustmail run mail_mart margin=pm_nat --out runs/mail_mart_pm_nat  a row of Table 1
    robustmail run mail_mart:wrn                                        the paper's WRN-32-10 (Table 3)
    robustmail run mail_mart:code                                       the authors' released code

Read as in the paper: beta 6 (the code's default: 5), weights of mean one. The paper's Algorithm 4 is in an appendix
that is not public; that the weights act on the BCE term alone is read from the authors' code.
"""

from robustmail import MART, PGD, SGD, Recipe, Sigmoid, Stairs, cifar10, pm_adv, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=MART(beta=6.0),  # learn it, mind those that are wrong already,
    margin=pm_adv,  # and listen to those
    weighter=Sigmoid(slope=2.0, bias=0.0),  # where the true class leads least
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

code = recipe.but(
    attack=PGD(eps=0.031, alpha=0.007, steps=10, start="gaussian"),
    objective=MART(beta=5.0),
    weighter=Sigmoid(slope=2.0, bias=0.0, normalize=False, scale=3.0),
    burn_in=76,
    epochs=120,
    optimizer=SGD(lr=Stairs({0: 0.01, 75: 0.001, 90: 0.0001, 100: 0.00001}), momentum=0.9, weight_decay=3.5e-3),
    select="last",
)
