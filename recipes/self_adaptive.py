"""Self-adaptive training: TRADES whose labels are slowly replaced by what the model itself predicts.

Huang et al., "Self-Adaptive Training: beyond Empirical Risk Minimization", NeurIPS 2020, in the setting of the MAIL
paper. As in the authors' code: the targets start as one-hot labels and move by a tenth towards the natural prediction
from epoch 71 of 100 on, before the loss; the cross-entropy, not the divergence, is weighted by the largest target, with
mean one. beta 6 as in TRADES. The targets are remembered per example; `robustmail show self_adaptive` says so.

    robustmail run self_adaptive
    robustmail run self_adaptive objective.start=50 --out runs/self_adaptive_50
"""

from robustmail import SGD, Affine, Recipe, SelfAdaptive, Stairs, cifar10, target_confidence, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=SelfAdaptive(beta=6.0, start=70, decay=0.9),  # learn what the model has come to believe of each image,
    margin=target_confidence(decay=0.9),
    weighter=Affine(alpha=1.0),  # and most where it is sure: w = max_k t_k, of mean one
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)
