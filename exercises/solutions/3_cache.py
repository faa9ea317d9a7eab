import copy


def fork(cache):
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


def ask(chat_model, gate, cache, guard_prompt_ids):
    options = {"past_key_values": fork(cache), "use_cache": True}
    with gate.opened():
        hidden = chat_model.base_model(input_ids=guard_prompt_ids, **options).last_hidden_state  # (1, M, H)
    return hidden[:, -1]
