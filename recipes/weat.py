"""WEAT: TRADES on the adversarial image, weighed by the energy of the natural one; needs no label for its weights.

Mirza et al., "Shedding More Light on Robust Classifiers under the Lens of Energy-based Models", ECCV 2024, in the
setting of the MAIL paper. w = 1 / log(1 + exp |E(x)|), not divided by its mean, on both terms; beta 6 as in the
authors' script. `:nat` is the form with the cross-entropy of x. The weights are about 0.1 to 0.5, so the loss is
smaller than that of TRADES. A second-hand table has 49.75 % under AutoAttack for this form, 49.02 for `:nat`, 49.46
for TRADES and 49.42 for MAIL-TRADES (ResNet-18).

    robustmail run weat
    robustmail run weat:nat
"""

from robustmail import SGD, TRADES, Recipe, Softplus, Stairs, cifar10, energy, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=TRADES(beta=6.0, weigh="both", anchor="adv"),  # learn it, pull the two predictions together,
    margin=energy,  # and listen to those
    weighter=Softplus(normalize=False),  # of small energy
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

nat = recipe.but(objective=TRADES(beta=6.0, weigh="both"))
