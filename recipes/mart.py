"""MART: a boosted cross-entropy under attack, and consistency where the natural prediction is wrong.

Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020, in the setting of
the MAIL paper (NeurIPS 2021), which is MART's own. beta: 5 in MART's ResNet script, 6 in its WRN script; MAIL does not
say.

    robustmail run mart
    robustmail run mart:wrn                                  the paper's WRN-32-10 (Table 3)
    robustmail run mart:code                                 the baseline of MAIL's released code
"""

from robustmail import MART, PGD, SGD, Recipe, Stairs, cifar10, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=MART(beta=5.0),  # learn it, and mind those that are wrong already
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
