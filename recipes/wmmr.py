"""WMMR: adversarial training that weighs examples by the exponential of their probabilistic margin.

Zeng et al., "Are Adversarial Examples Created Equal?", AAAI 2021, in the setting of the MAIL paper: PM_adv half a
year before MAIL. As in the authors' code the weights are not divided by their mean. Detached, where their gradient
runs through the weights and their attack ascends the weighted loss, too: with the same weights their gradients are
about 1.3 times as large.

    robustmail run wmmr
    robustmail run wmmr weighter.normalize=True --out runs/wmmr_mean_one
"""

from robustmail import AT, SGD, Exp, Recipe, Stairs, cifar10, pm_adv, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=AT(),  # learn it,
    margin=pm_adv,  # and listen to those
    weighter=Exp(alpha=0.5, normalize=False),  # that are on the wrong side, a little more
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)
