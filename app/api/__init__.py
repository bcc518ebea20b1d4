"""The HTTP side: admission, routes, uploads, events, charts and problems."""
