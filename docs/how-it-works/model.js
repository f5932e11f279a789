// Shows the model itself in place of the picture of its decoding, as soon as it has generated an image: without a network
// or WebAssembly, the picture stays.
const picture = document.querySelector('img[src$="decoding.png"]').closest("p");
const frame = document.createElement("iframe");
Object.assign(frame, { src: "../model/index.html", title: "The model of the package, in your browser" });
Object.assign(frame.style, { width: "100%", height: "0", border: "0" });
picture.before(frame);
frame.onload = () => {
  const { body } = frame.contentDocument;
  const show = () => {
    frame.style.height = `${body.scrollHeight + 20}px`;
    picture.style.display = picture.nextElementSibling.style.display = "none"; // and what explains it
  };
  new MutationObserver(show).observe(body, { attributeFilter: ["data-done"] });
};
