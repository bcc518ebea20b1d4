// Charts that answer the mouse, in the place of their pictures. Without this file the pictures stay.
const OPTIONS = {
  // Expressions of a chart are interpreted, never compiled: the page allows no eval.
  ast: true,
  actions: false,
  renderer: "svg",
  // Style sheets come from style.css alone.
  defaultStyle: false,
  tooltip: { disableDefaultStyle: true },
};

async function draw(place) {
  const answer = await fetch(place.dataset.chart);
  if (!answer.ok) return;
  const specification = await answer.json();
  const drawn = document.createElement("div");
  drawn.className = "interactive";
  place.append(drawn);
  try {
    await window.vegaEmbed(drawn, specification, OPTIONS);
    place.querySelector("img").hidden = true;
    const picture = drawn.querySelector("svg");
    picture?.setAttribute("role", "img");
    picture?.setAttribute("aria-label", place.querySelector("img").alt);
  } catch (error) {
    drawn.remove();
    console.error(error);
  }
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    draw(entry.target);
  }
});

for (const place of document.querySelectorAll("[data-chart]")) seen.observe(place);
