"""VIR-AT: adversarial training that listens to unsure examples whose prediction the attack moves.

Fakorede et al., "Vulnerability-Aware Instance Reweighting for Adversarial Training", TMLR 2023, in the setting of the
MAIL paper; numbers and formula as in the authors' code: w = 0.007 + 7 exp(-10 p_y(x)) KL(p(x) || p(x')), not divided
by its mean. A sure example weighs 0.007 to 0.05, so the loss is smaller by an order than that of AT, as at a lower
rate: compare `weighter.normalize=True`.

    robustmail run vir_at
    robustmail run vir_at weighter.normalize=True --out runs/vir_at_mean_one
"""

from robustmail import AT, SGD, Affine, Recipe, Stairs, cifar10, torchattack, vulnerability

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=AT(),  # learn it,
    margin=vulnerability(gamma=10.0),  # and listen to those that the attack moves far
    weighter=Affine(alpha=7.0, bias=0.007, normalize=False),  # while the model is unsure of them
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)
