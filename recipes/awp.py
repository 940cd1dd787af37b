"""AWP: adversarial training while the weights are attacked, too.

Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, in the setting of the MAIL paper
(NeurIPS 2021), which does not say which AWP it ran. Here AT-AWP with gamma 0.01, as in the authors' AT script; their
attack runs in train mode, ours in eval mode unless attack_mode=train.

    robustmail run awp
    robustmail run awp perturbation.gamma=0.005 --out runs/awp_gamma_0.005
    robustmail run awp:wrn                                             the paper's WRN-32-10 (Table 3)
"""

from robustmail import AT, AWP, SGD, Recipe, Stairs, cifar10, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=AT(),  # and learn it
    perturbation=AWP(gamma=0.01),  # where the weights are worst for it
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

wrn = recipe.but(
    model="cifar_wrn32_10",
    optimizer=SGD(lr=Stairs({0: 0.1, 74: 0.01, 89: 0.001}), momentum=0.9, weight_decay=7e-4),
)
