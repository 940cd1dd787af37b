"""Facts about the models in RobustBench's zoo for CIFAR: which architecture each is, and how its images are normalised.

From robustbench/model_zoo/cifar10.py and cifar100.py at commit 78fcc9e (Linf and L2). Left out are ensembles, networks
with Neural ODEs, and those whose code is nowhere else.
"""

from __future__ import annotations

__all__ = ["ZOO", "zoo_entries", "zoo_normalization"]

_CIFAR100 = "0.507075,0.486549,0.440918/0.267334,0.256438,0.27615"
_CIFAR100_ROUNDED = "0.5071,0.4867,0.4408/0.2675,0.2565,0.2761"
_CIFAR10_ROUNDED = "0.491,0.482,0.447/0.247,0.243,0.262"

_MODELS = {  # (architecture, classes, normalisation outside of the network): names
    ("PreActResNet-18", 10, "none"): "Andriushchenko2020Understanding",
    ("ResNet-18", 10, "none"): "Sehwag2021Proxy_R18 Addepalli2021Towards_RN18 Addepalli2022Efficient_RN18",
    ("ResNet-50", 10, "cifar10-per-image"): "Engstrom2019Robustness",
    ("ResNet-50", 10, "cifar10"): "Augustin2020Adversarial",
    ("WideResNet-28-10", 10, "none"):
        "Standard Carmon2019Unlabeled Sehwag2020Hydra Wang2020Improving Wu2020Adversarial_extra Zhang2020Geometry "
        "Sridhar2021Robust",
    ("WideResNet-28-10", 10, "half"): "Hendrycks2019Using",
    ("WideResNet-28-10", 10, _CIFAR10_ROUNDED): "Rony2019Decoupling",
    ("WideResNet-34-10", 10, "none"):
        "Zhang2019Theoretically Zhang2019You Huang2020Self Zhang2020Attacks Wu2020Adversarial Sehwag2021Proxy "
        "Sitawarin2020Improving Cui2020Learnable_34_10 Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10 "
        "Jia2022LAS-AT_34_10 Addepalli2022Efficient_WRN_34_10 Cui2023Decoupled_WRN-34-10 Chen2024Data_WRN_34_10",
    ("WideResNet-34-10", 10, "cifar10"):
        "Chen2020Efficient Augustin2020Adversarial_34_10 Augustin2020Adversarial_34_10_extra",
    ("WideResNet-34-15", 10, "none"): "Sridhar2021Robust_34_15",
    ("WideResNet-34-20", 10, "none"): "Cui2020Learnable_34_20 Chen2021LTD_WRN34_20 Chen2024Data_WRN_34_20",
    ("WideResNet-34-20", 10, "cifar10"): "Rice2020Overfitting",  # Linf
    ("PreActResNet-18", 10, "cifar10"): "Wong2020Fast Rice2020Overfitting",  # the latter of L2
    ("BoostingWideResNet-34-20", 10, "cifar10"): "Pang2020Boosting",
    ("WideResNet-70-16", 10, "none"): "Jia2022LAS-AT_70_16",
    ("DMPreActResNet-18", 10, "none"):
        "Rebuffi2021Fixing_R18_ddpm Rebuffi2021Fixing_R18_cutmix_ddpm Rade2021Helper_R18_extra Rade2021Helper_R18_ddpm "
        "Gowal2021Improving_R18_ddpm_100m",
    ("DMWideResNet-28-10", 10, "none"):
        "Gowal2020Uncovering_28_10_extra Rebuffi2021Fixing_28_10_cutmix_ddpm Rade2021Helper_ddpm "
        "Gowal2021Improving_28_10_ddpm_100m Pang2022Robustness_WRN28_10 Wang2023Better_WRN-28-10 "
        "Xu2023Exploring_WRN-28-10 Cui2023Decoupled_WRN-28-10",
    ("DMWideResNet-34-10", 10, "none"): "Rade2021Helper_extra",
    ("DMWideResNet-34-20", 10, "none"): "Gowal2020Uncovering_34_20",
    ("DMWideResNet-70-16", 10, "none"):
        "Gowal2020Uncovering Gowal2020Uncovering_extra Gowal2020Uncovering_70_16 Gowal2020Uncovering_70_16_extra "
        "Rebuffi2021Fixing_70_16_cutmix_ddpm Rebuffi2021Fixing_70_16_cutmix_extra Gowal2021Improving_70_16_ddpm_100m "
        "Pang2022Robustness_WRN70_16 Wang2023Better_WRN-70-16",
    ("DMWideResNet-82-8", 10, "none"): "Bartoldson2024Adversarial_WRN-82-8",
    ("DMWideResNet-94-16", 10, "none"): "Bartoldson2024Adversarial_WRN-94-16",
    ("DMWideResNet-106-16", 10, "none"): "Rebuffi2021Fixing_106_16_cutmix_ddpm",
    ("RaWideResNet-70-16", 10, "none"): "Peng2023Robust",
    ("XCiT-S12", 10, "none"): "Debenedetti2022Light_XCiT-S12",
    ("XCiT-M12", 10, "none"): "Debenedetti2022Light_XCiT-M12",
    ("XCiT-L12", 10, "none"): "Debenedetti2022Light_XCiT-L12",
    ("PreActResNet-18", 100, "none"): "Addepalli2021Towards_PARN18",
    ("PreActResNet-18", 100, _CIFAR100): "Rice2020Overfitting",
    ("ResNet-18", 100, "none"): "Addepalli2022Efficient_RN18",
    ("WideResNet-28-10", 100, "half"): "Hendrycks2019Using",
    ("WideResNet-34-10", 100, "none"):
        "Cui2020Learnable_34_10_LBGAT0 Cui2020Learnable_34_10_LBGAT6 Cui2020Learnable_34_10_LBGAT9_eps_8_255 "
        "Sehwag2021Proxy Sitawarin2020Improving Addepalli2021Towards_WRN34 Chen2021LTD_WRN34_10 Jia2022LAS-AT_34_10 "
        "Addepalli2022Efficient_WRN_34_10 Cui2023Decoupled_WRN-34-10 Cui2023Decoupled_WRN-34-10_autoaug "
        "Chen2024Data_WRN_34_10",
    ("WideResNet-34-10", 100, _CIFAR100_ROUNDED): "Chen2020Efficient",
    ("WideResNet-34-10", 100, _CIFAR100): "Wu2020Adversarial",
    ("WideResNet-34-20", 100, "none"): "Cui2020Learnable_34_20_LBGAT6 Jia2022LAS-AT_34_20",
    ("DMPreActResNet-18", 100, "none"): "Rebuffi2021Fixing_R18_ddpm Rade2021Helper_R18_ddpm",
    ("DMWideResNet-28-10", 100, "none"):
        "Rebuffi2021Fixing_28_10_cutmix_ddpm Pang2022Robustness_WRN28_10 Wang2023Better_WRN-28-10 "
        "Cui2023Decoupled_WRN-28-10",
    ("DMWideResNet-70-16", 100, "none"):
        "Gowal2020Uncovering Gowal2020Uncovering_extra Rebuffi2021Fixing_70_16_cutmix_ddpm Pang2022Robustness_WRN70_16 "
        "Wang2023Better_WRN-70-16",
    ("XCiT-S12", 100, "none"): "Debenedetti2022Light_XCiT-S12",
    ("XCiT-M12", 100, "none"): "Debenedetti2022Light_XCiT-M12",
    ("XCiT-L12", 100, "none"): "Debenedetti2022Light_XCiT-L12",
}  # fmt: skip

ZOO: dict[str, list[tuple[str, int, str]]] = {}
"""(architecture, classes, normalisation outside of the network) of the models, by name"""
for _facts, _names in _MODELS.items():
    for _name in _names.split():
        ZOO.setdefault(_name, []).append(_facts)


def zoo_entries(name: str) -> list[tuple[str, int, str]]:
    """(architecture, classes, normalisation outside of the network) of the models that have a name in the zoo; letter
    case, "-" and "_" do not count."""
    return ZOO.get(name) or next((entries for key, entries in ZOO.items() if _plain(key) == _plain(name)), [])


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def zoo_normalization(name: str, classes: int) -> str | None:
    """How images of a model in RobustBench's zoo are normalised outside of the network, in the words of --normalize.

    name: of the model. classes: its number of classes. None if it is no such name.
    """
    return next((how for _, number, how in zoo_entries(name) if number == classes), None)
