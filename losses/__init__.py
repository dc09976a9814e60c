"""From clean tokens to losses: noise, objectives, the range of t that is trained on."""
