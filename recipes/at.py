"""AT: train on the images that an attack makes of the training images.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, in the setting of the MAIL
paper (NeurIPS 2021).

    robustmail run at
    robustmail run at attack.steps=7
"""

from robustmail import AT, SGD, Recipe, Stairs, cifar10, torchattack

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
