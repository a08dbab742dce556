"""OpenAI's protocol over HTTP, for any `Service`. Knows no device and no scheduler; imports no torch."""
