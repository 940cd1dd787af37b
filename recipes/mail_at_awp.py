"""MAIL-AT-AWP: MAIL-AT while the weights are attacked, too.

MAIL's numbers as in `mail_at`, AWP's as in `awp`. Not in the paper.

    robustmail run mail_at_awp
    robustmail run mail_at_awp margin=pm_nat --out runs/mail_at_awp_pm_nat
"""

from robustmail import AT, AWP, SGD, Recipe, Sigmoid, Stairs, cifar10, pm_adv, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=AT(),  # learn it,
    margin=pm_adv,  # and listen to those
    weighter=Sigmoid(slope=10.0, bias=-0.5),  # that are far on the wrong side,
    perturbation=AWP(gamma=0.01),  # with weights that are worst for it
    burn_in=74,
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)
