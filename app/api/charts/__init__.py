"""Charts: Vega-Lite specifications of reports, and the process that renders them (`python -m app.api.charts`)."""
