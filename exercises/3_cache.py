"""Exercise 3: a verdict from the chat's key/value cache, without disturbing the chat.

The chat path has read T tokens with the gate shut, and its cache holds what later tokens read. The
guard reads only the M tokens of the guard prompt behind them, with the gate open. Afterwards the chat goes
on from its own cache, so that must be as it was: same length, same tensors.

A transformers cache has one layer object for each layer of the model, in the list `cache.layers`. Each holds
the tensors `keys` and `values`. A pass puts new tensors in their place, and leaves the old ones as they are.
So a fork needs copies of the layer objects, with all their attributes, but can share the tensors. It then
costs the same at any T. Two other ways fail: `copy.deepcopy` copies all tensors, and cropping the guard
prompt off again does not work here, because the model attends through a sliding window and its cache drops
old tokens.

Check yourself: pytest exercises -k 3_cache. The project has `fork` in chat.py and `ask` in model.py.
"""


def fork(cache):
    """A cache that starts with the same tensors and grows alone, so the original stays whole."""
    raise NotImplementedError


def ask(chat_model, gate, cache, guard_prompt_ids):
    """Read guard_prompt_ids (1, M) behind the cache, gate open -> hidden state of the last token (1, H).

    chat_model.base_model(input_ids=..., past_key_values=..., use_cache=True).last_hidden_state is (1, M, H).
    """
    raise NotImplementedError
