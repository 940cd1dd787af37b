"""MAIL-AT: adversarial training that listens to the examples whose probabilistic margin is small.

Wang et al., "Probabilistic Margins for Instance Reweighting in Adversarial Training", NeurIPS 2021.

    robustmail run mail_at
    robustmail run mail_at margin=pm_nat --out runs/mail_at_pm_nat  a row of Table 1
    robustmail run mail_at:wrn                                      the paper's WRN-32-10 (Table 3)
    robustmail run mail_at:code                                     the authors' released code

Read as in the paper: weights of mean one, eps 8/255, uniform start, 74 epochs of burn-in, 100 epochs.
"""

from robustmail import AT, PGD, SGD, Recipe, Sigmoid, Stairs, cifar10, pm_adv, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=AT(),  # learn it,
    margin=pm_adv,  # and listen to those
    weighter=Sigmoid(slope=10.0, bias=-0.5),  # that are far on the wrong side
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
    weighter=Sigmoid(slope=10.0, bias=-0.5, normalize=False, scale=3.0),
    burn_in=76,
    epochs=120,
    optimizer=SGD(lr=Stairs({0: 0.01, 75: 0.001, 90: 0.0001, 100: 0.00001}), momentum=0.9, weight_decay=3.5e-3),
    select="last",
)
