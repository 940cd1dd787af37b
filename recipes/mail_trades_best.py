"""MAIL-TRADES with what helps most: an average of the weights, label smoothing, IDBH and AWP.

No data beside CIFAR-10. Ours, and not measured at full length: each ingredient is what the literature reports to help
("Which ingredients help" in the docs has its numbers and those of a small ablation of ours). IDBH[weak] + AWP + SWA
is reported at 52.46 % under AutoAttack for a PreAct-ResNet-18 (second hand, three seeds).

    robustmail run mail_trades_best
    robustmail run mail_trades_best swa=75 select=best-swa --out runs/mail_trades_best_swa
    robustmail run mail_trades_best weighter=None margin=None --out runs/trades_best       the control without weights
"""

from robustmail import AWP, IDBH, SGD, TRADES, Recipe, Sigmoid, Stairs, cifar10, pm_adv, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    augment=IDBH("weak"),  # see each image in many ways,
    label_smoothing=0.1,  # be sure of nothing,
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=TRADES(beta=5.0),  # pull the two predictions together,
    margin=pm_adv,  # and pull hardest
    weighter=Sigmoid(slope=2.0, bias=0.0),  # where the true class leads least,
    perturbation=AWP(gamma=Stairs({0: 0.0, 9: 0.005})),  # with weights that are worst for it,
    ema=0.9995,  # and keep the average of the weights
    burn_in=74,
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.1, 74: 0.01, 89: 0.001}), momentum=0.9, weight_decay=5e-4),
    validate=("pgd10", "cw"),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)
