"""MAIL-TRADES-AWP: MAIL-TRADES while the weights are attacked, too, with an average of the weights.

Not in the paper: the best combination that we can offer of what it compares. AWP as in TRADES-AWP, and an exponential
moving average of the weights, which is what is validated, kept and evaluated.

    robustmail run mail_trades_awp
    robustmail run mail_trades_awp ema=None perturbation.gamma=0.01 --out runs/mail_trades_awp_no_ema
    robustmail run mail_trades_awp:wrn
"""

from robustmail import AWP, SGD, TRADES, Recipe, Sigmoid, Stairs, cifar10, pm_adv, torchattack

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=TRADES(beta=5.0),  # pull the two predictions together,
    margin=pm_adv,  # and pull hardest
    weighter=Sigmoid(slope=2.0, bias=0.0),  # where the true class leads least,
    perturbation=AWP(gamma=Stairs({0: 0.0, 9: 0.005})),  # with weights that are worst for it
    burn_in=74,
    ema=0.999,
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

wrn = recipe.but(
    model="cifar_wrn32_10",
    optimizer=SGD(lr=Stairs({0: 0.1, 74: 0.01, 89: 0.001}), momentum=0.9, weight_decay=7e-4),
)
