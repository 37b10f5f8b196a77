"""The records that both stories share: what a layer's factors are, and the file they are kept in.

shapes (the glossary), band (the turns of slow pairs, as few functions), rope, formats (bits of a latent), projection,
operands (what kernels take, derived once), layer, record (`Factors`), safefile, summary (`info`)
"""
