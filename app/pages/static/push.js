// Uploads with progress, and files that are dropped on a form. Without this file the forms work as they are.

function send(form) {
  const bar = form.querySelector("progress");
  const problem = form.querySelector("[role=alert]");
  const button = form.querySelector("button");
  const request = new XMLHttpRequest();
  const failed = (text) => {
    problem.textContent = text;
    problem.hidden = false;
    bar.hidden = true;
    button.disabled = false;
  };
  request.upload.addEventListener("progress", (event) => {
    bar.max = event.total || 1;
    bar.value = event.loaded;
  });
  request.addEventListener("load", () => {
    if (request.status < 400) {
      // The page of what was pushed, to which the answer leads.
      location.assign(request.responseURL);
      return;
    }
    const answer = new DOMParser().parseFromString(request.responseText, "text/html");
    const said = [...answer.querySelectorAll("main h1, main p")].slice(0, 2).map((one) => one.textContent.trim());
    failed(said.join(": ") || `The service answered with ${request.status}.`);
  });
  request.addEventListener("error", () => failed("The service cannot be reached."));
  problem.hidden = true;
  bar.hidden = false;
  bar.value = 0;
  button.disabled = true;
  request.open("POST", form.action);
  request.send(new FormData(form));
}

for (const form of document.querySelectorAll("[data-push]")) {
  const file = form.querySelector("input[type=file]");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(form);
  });
  form.addEventListener("dragover", (event) => {
    event.preventDefault();
    form.classList.add("dragged");
  });
  form.addEventListener("dragleave", () => form.classList.remove("dragged"));
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    form.classList.remove("dragged");
    if (event.dataTransfer.files.length) file.files = event.dataTransfer.files;
    const name = form.querySelector("[name=name]");
    if (!name.value && file.files.length) name.value = file.files[0].name.replace(/\.[^.]*$/, "");
  });
}
