"""HAT: TRADES with helper images, whose labels come from a network of standard training.

Rade and Moosavi-Dezfooli, "Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off", ICLR
2022. beta 2.5 and gamma 0.5 as in the authors' README (their code's default of gamma is 1); helper and label as in
their code: x + 2 (x' - x), not clipped, with the class that the standard network gives x'. Rate, decay and length are
those of the MAIL paper. The teacher is trained first, without an attack:

    robustmail run hat:standard --out runs/standard
    robustmail run hat teacher=runs/standard
    robustmail run hat teacher=runs/standard objective.gamma=1 --out runs/hat_gamma_1
"""

from robustmail import AT, HAT, PGD, SGD, Recipe, Stairs, cifar10, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    teacher="runs/standard",
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=HAT(beta=2.5, gamma=0.5),  # go as far again, and believe the teacher there
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

standard = recipe.but(
    teacher=None,
    attack=PGD(eps=8 / 255, alpha=0.0, steps=1, start="none"),
    objective=AT(),
    validate="nat",
    evaluate=("nat",),
)
