"""One file per op: contract, plain-torch definition, backends, autograd."""
