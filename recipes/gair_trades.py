"""GAIR-TRADES: TRADES that works hardest on the examples that fall after few steps of the attack.

Zhang et al., "Geometry-aware Instance-reweighted Adversarial Training", ICLR 2021, in the setting of the
MAIL paper (NeurIPS 2021). There is no single definition. Here the weights act on the KL term, where MAIL-TRADES puts
its own (like for like), and kappa is counted along the KL attack. GAIRAT's removed script put them on the natural
cross-entropy: objective.weigh=nat; its authors say that one may weigh either or both.

    robustmail run gair_trades
    robustmail run gair_trades objective.weigh=nat objective.beta=6 --out runs/gair_trades_nat
    robustmail run gair_trades margin=lps --out runs/gair_trades_lps
"""

from robustmail import PGD, SGD, TRADES, Recipe, Stairs, Tanh, cifar10, kappa

recipe = Recipe(
    data=cifar10(),
    model="cifar_resnet18",
    attack=PGD(eps=8 / 255, alpha=2 / 255, steps=10, loss="kl", start="gaussian"),  # find disagreement, keep a trace,
    objective=TRADES(beta=5.0),  # pull the two predictions together,
    margin=kappa,  # and pull hardest on those
    weighter=Tanh(lam=-1.0, steps=10),  # that fewer steps of the attack fool
    burn_in=74,
    epochs=100,
    batch=128,
    optimizer=SGD(lr=Stairs({0: 0.01, 74: 0.001, 89: 0.0001}), momentum=0.9, weight_decay=3.5e-3),
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)
