// Progress as it goes on: every element with data-events listens to the events of one analysis.
const FINAL = "final";

for (const card of document.querySelectorAll("[data-events]")) {
  const events = new EventSource(card.dataset.events);
  const show = (event) => {
    const analysis = JSON.parse(event.data);
    const { done, total, phase } = analysis.progress;
    const bar = card.querySelector("progress");
    if (bar) {
      bar.max = total || 1;
      bar.value = done;
    }
    const texts = { status: analysis.status, phase, count: total ? `${done}/${total}` : "" };
    for (const [name, text] of Object.entries(texts)) {
      const place = card.querySelector(`[data-live="${name}"]`);
      if (place) place.textContent = text;
    }
    if (event.type === FINAL) {
      events.close();
      // What else the page says of the analysis has changed too.
      location.reload();
    }
  };
  for (const type of ["status", "progress", FINAL]) events.addEventListener(type, show);
}
