"""TRADES-AWP: TRADES while the weights are attacked, too.

Wu et al., "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, in the setting of the MAIL paper
(NeurIPS 2021). gamma 0.005 after 9 epochs of warm-up, as in the authors' TRADES script, whose beta is 6.

    robustmail run trades_awp
    robustmail run trades_awp objective.beta=6 objective.natural_passes=2 --out runs/trades_awp_beta_6
    robustmail run trades_awp:wrn                            the paper's WRN-32-10 (Table 3)
"""

from robustmail import AWP, SGD, TRADES, Recipe, Stairs, cifar10, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=TRADES(beta=5.0),  # pull the two predictions together,
    perturbation=AWP(gamma=Stairs({0: 0.0, 9: 0.005})),  # where the weights are worst for it
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

wrn = recipe.but(
    model="cifar_wrn32_10",
    optimizer=SGD(lr=Stairs({0: 0.1, 74: 0.01, 89: 0.001}), momentum=0.9, weight_decay=7e-4),
)
