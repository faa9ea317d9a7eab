"""Exercise 4: the guard's loss, with unknown labels and with weights.

    loss = 1/2 BCE(z_0, u; w_0) + 1/(2K) sum_k BCE(z_k, y_k; w_k)      w = negatives / positives
    loss = 1/K sum_k BCE(z_k, y_k; w_k)                                without the unsafe head; z_0 is unused

z_0 is the logit of unsafe, z_1..K are those of the categories. Each BCE is a mean over the B rows, and its
positive rows count w times, so that rare harm is not drowned out. A label that is NaN is unknown. Its BCE is
0 and gives no gradient, but its row counts in B. It counts neither as negative nor as positive in w.

torch.nn.functional.binary_cross_entropy_with_logits takes a `pos_weight`. Mind that 0 times NaN is NaN.

Check yourself: pytest exercises -k 4_loss. The project's own are `guard_loss` and `Split` in train.py.
"""


def pos_weight_of(labels):
    """w of each output, (1 + K,), from the labels of all training rows, (N, 1 + K)."""
    raise NotImplementedError


def guard_loss(logits, labels, pos_weight, unsafe_head):
    """The loss above, one number. logits, labels: (B, 1 + K); pos_weight: (1 + K,)."""
    raise NotImplementedError
