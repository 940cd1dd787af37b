"""SOVR: adversarial training in which the examples of smallest logit margin get a one-versus-rest loss.

Kanai et al., "Switching One-Versus-the-Rest Loss to Increase the Margin of Logits for Adversarial Robustness", 2022,
in the setting of the MAIL paper. Derived from the abstract: neither code nor the equation of the loss could be read,
and the share of 40 % is ours.

    robustmail run sovr
    robustmail run sovr weighter.share=0.2 --out runs/sovr_20
"""

from robustmail import SGD, SOVR, Lowest, Recipe, Stairs, cifar10, logit_margin, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=SOVR(),  # learn it, with another loss for those
    margin=logit_margin,  # whose true class leads least
    weighter=Lowest(share=0.4, normalize=False),  # in the batch
    burn_in=74,
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)
