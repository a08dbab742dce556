"""From logits to tokens: rules, penalties, filters, the draw, and log probabilities. Knows no model and no schedule."""
