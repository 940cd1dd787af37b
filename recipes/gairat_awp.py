"""GAIRAT-AWP: GAIRAT while the weights are attacked, too.

AWP is said to mend the sharp minima that reweighted training ends in ("Geometry-aware weight perturbation", 2024,
from its abstract: there the weights act in the perturbation; here in the loss that the perturbation ascends).
GAIRAT's numbers as in `gairat`, AWP's as in `awp`. Not in the MAIL paper.

    robustmail run gairat_awp
"""

from robustmail import AT, AWP, PGD, SGD, Recipe, Stairs, Tanh, cifar10, kappa

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=PGD(eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows, with a trace,
    objective=AT(),  # learn it,
    margin=kappa,  # and listen to those
    weighter=Tanh(lam=-1.0, steps=10),  # that fewer steps of the attack fool,
    perturbation=AWP(gamma=0.01),  # with weights that are worst for it
    burn_in=74,
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)
