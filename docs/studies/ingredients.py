"""Which ingredients help, at a scale that two CPU cores carry: a narrow ResNet-18 and 2,500 real images of CIFAR-10.

    robustmail trials docs/studies/ingredients.py:{at,at_ema,at_swa,at_smoothing,at_idbh,at_all} --seeds 0:3 \\
        --baseline ingredients.py:at --out trials/ingredients-at

and the same with mail_trades instead of at. All rows keep both averages; `select` says which weights are evaluated.
"""

from robustmail import AT, IDBH, PGD, SGD, TRADES, Recipe, Sigmoid, Stairs, cifar10, pm_adv, subset

BUDGET = {"eps": 8 / 255, "alpha": 3 / 255, "steps": 5}

at = Recipe(
    data=subset(cifar10(validation=250), train=2750),
    model="cifar_resnet18_w8",
    attack=PGD(**BUDGET),
    objective=AT(),
    epochs=8,
    batch=64,
    optimizer=SGD(lr=Stairs({0: 0.05, 5: 0.005, 7: 0.0005}), momentum=0.9, weight_decay=5e-4),
    ema=0.99,
    swa=5,
    select="last-live",
    validate="nat",
    evaluate=("nat", "pgd20", "cw"),
    test_size=1000,
)
at_ema = at.but(select="last-ema")
at_swa = at.but(select="last-swa")
at_smoothing = at.but(label_smoothing=0.2)
at_idbh = at.but(augment=IDBH("weak"))
at_all = at.but(label_smoothing=0.2, augment=IDBH("weak"), select="last-ema")

mail_trades = at.but(
    attack=PGD(**BUDGET, loss="kl", start="gaussian"),
    objective=TRADES(beta=5.0),
    margin=pm_adv,
    weighter=Sigmoid(slope=2.0, bias=0.0),
    burn_in=5,
)
mail_trades_ema = mail_trades.but(select="last-ema")
mail_trades_swa = mail_trades.but(select="last-swa")
mail_trades_smoothing = mail_trades.but(label_smoothing=0.2)
mail_trades_idbh = mail_trades.but(augment=IDBH("weak"))
mail_trades_all = mail_trades.but(label_smoothing=0.2, augment=IDBH("weak"), select="last-ema")
