"""KL-DRO: adversarial training on the worst mixture of each batch, weights that are a softmax of the losses.

The closed form of distributionally robust optimisation with a KL ball, within a batch: the heuristic of "Doubly
Robust Instance- Reweighted Adversarial Training" (DONE; Sow et al., ICLR 2024), in the setting of the MAIL paper.
Derived from its abstract: the algorithm keeps a normaliser across batches, this does not, and the temperature is
ours. `:entropy_weighted` weighs by the entropy of the prediction instead (EWAT; Kim et al. 2021, from its abstract).

    robustmail run dro
    robustmail run dro:entropy_weighted
"""

from robustmail import AT, SGD, Affine, Recipe, Softmax, Stairs, cifar10, entropy, loss_adv, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("PGD", eps=8 / 255, alpha=2 / 255, steps=10),  # make each image as wrong as the ball allows,
    objective=AT(),  # learn it,
    margin=loss_adv,  # and listen to those
    weighter=Softmax(temperature=1.0),  # whose loss is largest in the batch
    burn_in=74,
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

entropy_weighted = recipe.but(margin=entropy, weighter=Affine(alpha=1.0))
