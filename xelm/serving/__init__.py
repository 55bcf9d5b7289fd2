"""HTTP server of an ensemble and its models, with the interfaces of OpenAI."""
