"""How do results look to a person? Numbers in a few digits, and what each metric is called and means."""

# Metrics by their names in an `Evaluation`: a title, and what it is. Shares are printed in %, all others as they are.
SHARES = {
    "weighted_accuracy": ("Weighted accuracy", "share of the total sample weight that is classified correctly"),
    "accuracy": ("Accuracy", "share of the images that are classified correctly"),
    "top5": ("Top-5 accuracy", "share of the images whose class is among the five most probable"),
    "macro_f1": ("Macro F1", "mean over the classes of the harmonic mean of precision and recall"),
    "auroc": ("AUROC", "probability that an image of a class is ranked above one that is not of it"),
    "majority_accuracy": ("Majority accuracy", "accuracy against the most probable class of soft targets"),
    "majority_macro_f1": ("Majority macro F1", "macro F1 against the most probable class of soft targets"),
    "certain_accuracy": ("Certain accuracy", "accuracy on the images whose target is certain"),
    "ece": ("Calibration error", "ECE: mean distance of confidence from accuracy, over 15 bins of confidence"),
}
METRICS = SHARES | {"nll": ("NLL", "mean negative log-likelihood of the true class, in nats")}


def metric(name: str, value: float | None) -> str:
    """A metric as people read it.

    >>> metric("accuracy", 527 / 596), metric("nll", 0.31234), metric("auroc", None)
    ('88.42 %', '0.3123', '–')
    """
    if value is None:
        return "–"
    return percent(value) if name in SHARES else f"{value:.4f}"


def percent(share: float) -> str:
    """A share of 1 in %."""
    return f"{100 * share:.2f} %"


def short(count: float) -> str:
    """A count in three digits or so, as papers print it.

    >>> short(5288548), short(385814752), short(950), short(1.8e12)
    ('5.29M', '386M', '950', '1.8T')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def in_bytes(count: float) -> str:
    """Bytes in decimal units.

    >>> in_bytes(21322368)
    '21.3 MB'
    """
    text = short(count)
    return f"{text} B" if text[-1].isdigit() else f"{text[:-1]} {text[-1]}B"


def duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds.

    >>> duration(9.4), duration(75), duration(7384)
    ('9 s', '1 min 15 s', '2 h 03 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
