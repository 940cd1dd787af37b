"""TRADES with a million generated images, in the settings of DM-Improves-AT.

Wang et al., "Better Diffusion Models Further Improve Adversarial Training", ICML 2023, WRN-28-10 with SiLU: their
README reports 91.1 % natural, 63.35 % under AutoAttack with 1M images. From their command: TRADES with beta 5,
batches of 512, of which 0.7 are generated, rate 0.2 with a warm-up of 2.5 % and a cosine, Nesterov, no decay on
norms, average 0.995, label smoothing 0.1, 400 epochs, 1,024 images held out. Their selection attacks the average with
40 steps on the margin: `cw` here has 20. Not re-trained here.

    robustmail run trades_dm                                       with 1m.npz in the current folder
    robustmail run trades_dm 'data.extra=("20m_part1.npz", "20m_part2.npz")' --out runs/trades_dm_20m
    robustmail run trades_dm:mail                                  with MAIL's weights, not published by anybody
"""

from robustmail import SGD, TRADES, Recipe, Sigmoid, WarmupCosine, cifar10, mixed, pm_adv, torchattack

recipe = Recipe(
    data=mixed(cifar10(validation=1024), extra="1m.npz", share=0.7),  # among generated images, too,
    model="cifar_wrn28_10_silu",
    label_smoothing=0.1,
    attack=torchattack("TPGD", eps=8 / 255, alpha=2 / 255, steps=10),  # find where the model disagrees with itself,
    objective=TRADES(beta=5.0),  # and pull the two predictions together
    ema=0.995,
    epochs=400,
    batch=512,
    optimizer=SGD(
        lr=WarmupCosine(high=0.2, warmup=10, epochs=400),
        momentum=0.9,
        weight_decay=5e-4,
        nesterov=True,
        decay_norms=False,
    ),
    validate="cw",
    evaluate=("nat", "pgd100", "cw", "apgd", "aa"),
)

mail = recipe.but(margin=pm_adv, weighter=Sigmoid(slope=2.0, bias=0.0), burn_in=300)
