"""What an expert is and where it came from: registry, branch, grow, merge, verify, roll back.

The package knows the files of a RUN, their hashes, and the provenance of every expert version;
averages read and write safetensors arrays as NumPy. It deliberately opens no model: it imports
neither JAX nor transformers, and what a checkpoint computes is the business of `xelm`.
"""
