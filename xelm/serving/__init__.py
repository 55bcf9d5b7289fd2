"""One endpoint over many experts: HTTP with the interfaces of OpenAI."""
