from torch.nn import functional as F


def pos_weight_of(labels):
    positives, known = labels.nansum(0), (~labels.isnan()).sum(0)
    return (known - positives) / positives


def guard_loss(logits, labels, pos_weight, unsafe_head):
    options = {"pos_weight": pos_weight, "reduction": "none"}
    bce = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), **options)
    bce = bce.masked_fill(labels.isnan(), 0)  # (B, 1 + K)
    categories = bce[:, 1:].mean()
    return (bce[:, 0].mean() + categories) / 2 if unsafe_head else categories
