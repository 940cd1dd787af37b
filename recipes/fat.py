"""FAT: train on friendly adversarial images, whose attack stops soon after it has succeeded.

Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger", ICML 2020, in the setting of the
MAIL paper (NeurIPS 2021), which does not state the schedule of tau. Here: 0, 1, 2 from epochs 1, 51, 91, as in FAT's
script; noise 0.001 at each step, as there.

    robustmail run fat
    robustmail run fat attack.patience=10 --out runs/fat_patience_10  what AT does: nothing stops
    robustmail run fat:wrn                                            the paper's WRN-32-10 (Table 3)
"""

from robustmail import AT, PGD, SGD, Recipe, Stairs, cifar10

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=PGD(  # make each image wrong, and let go soon after,
        eps=8 / 255, alpha=2 / 255, steps=10, patience=Stairs({0: 0, 50: 1, 90: 2}), noise=0.001
    ),
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
