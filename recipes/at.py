"""AT: train on the images that an attack makes of the training images.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, in the setting of the MAIL
paper (NeurIPS 2021).

    robustmail run at
    robustmail run at attack.steps=7 --out runs/at_steps_7
    robustmail run at:wrn                                   the paper's WRN-32-10 (Table 3)
    robustmail run at:code                                  the baseline of MAIL's released code
"""

from robustmail import AT, PGD, SGD, Recipe, Stairs, cifar10, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=AT(),  # and learn it
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
    epochs=120,
    optimizer=SGD(lr=Stairs({0: 0.01, 75: 0.001, 90: 0.0001, 100: 0.00001}), momentum=0.9, weight_decay=3.5e-3),
    select="last",
)
