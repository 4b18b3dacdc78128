"""Models of Hugging Face as runs of moe_jax, and back: what `convert import` and `convert export`
do.

    settings.py      their config.json, read key by key; what is not read is refused
    entries.py       how keys of theirs become keys of ours and back
    rows.py          how tensors of theirs become parameters of ours and back, bit for bit
    contract.py      what a family of models is
    families/NAME.py one family each: all about it, from the two before
    decoder.py       entries and rows that families of decoders share
    deepseek.py      what DeepSeek's families and their descendants share
    further.py       layers that predict further tokens
    gemma.py         what Gemma's families share
    meaning.py       what a config of ours says of the function that a model computes
    mxfp4.py         experts of four bits, unpacked
    fp8.py           matrices of eight bits, unpacked
    shards.py        a parameter on the devices of a mesh, each with its own part
    tensors.py       folders of safetensors, read and written a part at a time
    t5.py            what T5 and its descendants share
    tokenizer_files.py  tokenizer.json
    sentencepiece_model.py  a SentencePiece model as a tokenizer.json
    importing.py, exporting.py
"""
