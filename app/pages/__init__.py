"""Pages for people: what there is, what runs, what a report says and how two differ, rendered on the server.

Pages read what the API reads, by the same functions. They work without JavaScript; with it, progress is live and charts
answer the mouse. Nothing comes from another host.
"""
