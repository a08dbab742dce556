"""How a spec computes and loads its weights."""
