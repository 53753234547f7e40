"""The test vectors of the wire protocol: `python -m fedoppu.simulations.vectors --out FOLDER`.

Each file is JSON with all inputs and outputs of a part of docs/protocol.md; bytes are hex, words and members numbers.
All but the recorded ones are functions of nothing: the same files come out on every machine. The recorded ones hold
what HPKE sealed with randomness of the operating system; they are to be opened, and a new run seals others.
"""
