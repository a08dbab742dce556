"""Networks of Transformers' own modules, over our cache and with our products (`--model-impl transformers`)."""
