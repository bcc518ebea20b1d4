"""The HTTP side: admission, routes, uploads, events, charts and the words of problems."""
