// Numbers and names as people read them.

const whole = new Intl.NumberFormat("en", {maximumFractionDigits: 0});

export const count = number => whole.format(number);
export const slides = number => `${count(number)} ${number === 1 ? "slide" : "slides"}`;
export const tiles = number => `${count(number)} ${number === 1 ? "tile" : "tiles"}`;
export const percent = share => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
export const digits = (number, most = 3) => String(Number(number.toPrecision(most)));
export const signed = number => (number < 0 ? `−${digits(-number)}` : `+${digits(number)}`);
export const millimetres = (px, mpp) => digits((px * mpp) / 1000);

/** Why an area of the slide holds no tile. */
export const REASONS = {tissue: "too little tissue", pen: "pen marks", black: "black", white: "blank", blur: "out of focus"};
/** What an area of the picture is. */
export const AREAS = {...REASONS, tissue: "tissue"};

/** The service's words as a sentence of their own. */
export const sentence = text => `${text.charAt(0).toUpperCase()}${text.slice(1).replace(/\.$/, "")}.`;

/** An element with properties and children; text is never read as HTML. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const byId = id => document.getElementById(id);
